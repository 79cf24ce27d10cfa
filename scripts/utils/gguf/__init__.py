"""GGUF: models for llama.cpp and Ollama, written, read back and tested.

  file        a model's metadata, vocabulary and tensors as llama.cpp reads them, streamed block by block
  metadata    a model's settings as llama.cpp reads them, or a refusal of what it cannot compute; and read back
  vocabulary  a tokenizer as llama.cpp reads it, or a refusal where llama.cpp would cut text otherwise
  tokenizer   the tokenizer in a GGUF file, as load_tokenizer gives it: the way back from vocabulary.py
  llamacpp    opening GGUF files, its own quantiser, importance matrices
  ollama      the Modelfile of a GGUF file, with the chat template in Go's language and the words to stop at
  self_test   the self-test of GGUF files, llama.cpp's tokens and logits against transformers'

Others import: file, metadata, tokenizer, llamacpp, ollama, self_test.
"""
