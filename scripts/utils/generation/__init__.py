"""Generation: one engine interface for the command line, the web, the server, PPO and evaluation.

  sampling             the next tokens of a batch whose rows have settings, seeds and penalties of their own
  engine               the Engine class: what is asked, what comes back, and text out of tokens
  cache                a KV cache of slots, for sequences of different lengths that come and go, and share prefixes
  batching             the scheduler: continuous batching, prefill in chunks, the prefix cache
  transformers_engine  a thread works for whoever submits, with one set of slots for each adapter
  prepacking           weights packed as the processor reads them; adapters in training folded in meanwhile
  speculation          speculative decoding: a draft writes ahead, and the model checks it in one forward pass
  drafts               what drafts: a smaller model, the first layers of the model itself, or the text so far
  llamacpp_engine      GGUF files, answered in batches like any other model
  vllm_engine          vLLM as one of the engines: it chooses the tokens, prompts and texts are those of the others
  vllm_backends        the two ways to reach it, a `vllm serve` that runs somewhere and its Python class here
  loading              the files of the model that is to answer, whether they belong together, and loading it
  folder_check         what lies in the folders of a model and an adapter, in words, and what would be refused

Others import: sampling, engine, cache, batching, transformers_engine, speculation, llamacpp_engine, loading,
folder_check.
"""
