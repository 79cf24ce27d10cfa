"""The package shared by the scripts, in wings; each wing's docstring names its modules in reading order.

A wing imports only from wings to its right, and only the modules its docstring offers (tests/repo checks it):

report > evaluation > web > serving > planning > rlhf > training > generation > data > gguf > models > lora > weights >
text > core
"""
