"""Text: tokenizers, vocabularies and their extension, prompt templates, records -> messages -> ids and labels.

  tokenizer          loading any so that it segments exactly as its own model file does, bulk encoding, saving
  pieces             What the pieces of a tokenizer file stand for, and the exact tokenizer.json twin of a
                     sentencepiece model
  vocabulary         merging sentencepiece models, growing byte-level BPE, and keeping what is reachable
  vocabulary_report  measured on held-out text, written as json, markdown and a picture
  text_sample        documents streamed from files, and a seeded sample that fits in memory
  prompts            every template and system prompt, messages -> token ids and labels, and the stop tokens
  conversations      every layout of pairs and prompts -> the conversation, the better and the worse answer
  tool_calls         how functions are told to the model, and the forms in which its answers call them

Others import: tokenizer, pieces, vocabulary, vocabulary_report, text_sample, prompts, conversations, tool_calls.
"""
