"""Generation: one engine interface for the command line, the web, the server, PPO and evaluation.

  sampling             Choosing the next tokens of a batch whose rows have settings of their own
  engine               what is asked, what comes back, and text out of tokens
  cache                sequences of different lengths side by side, that come and go, and keep what they share
  batching             many answers at once, which join and leave the batch at every step
  transformers_engine  a thread works for whoever submits, with one set of slots for each adapter
  speculation          a draft writes some tokens ahead, and the model checks them all in one forward pass
  drafts               a smaller model, the first layers of the model itself, or the text so far
  llamacpp_engine      GGUF files, answered in batches like any other model
  vllm_engine          vLLM as one of the engines: it chooses the tokens, prompts and texts are those of the others
  vllm_backends        the two ways to reach it, a `vllm serve` that runs somewhere and its Python class here
  loading              the files of the model that is to answer, whether they belong together, and loading it

Others import: sampling, engine, cache, batching, transformers_engine, speculation, llamacpp_engine, loading.
"""
