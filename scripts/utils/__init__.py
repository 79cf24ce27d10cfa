"""The small package shared by the scripts.

Layers, a module imports only from its right:
report > trainer > training > generation > data > modeling > checkpoints > prompts > tokenization > lora > arguments > files
"""
