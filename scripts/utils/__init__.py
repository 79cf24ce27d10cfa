"""The small package shared by the scripts.

Layers, a module imports only from its right (tests/test_repo.py checks it):

report > recipe > pages > charts > trainer > runs > training > predictions > inference > export > verification >
manifest > merge_inputs > generation > data > samples > documents > token_cache > parallel > modeling > losses >
gguf_files > merging > meta > checkpoints > streams > adapters > prompts > efficiency > vocabulary > tokenization >
pieces > corpus > lora > arguments > old_flags > files > json_stream
"""
