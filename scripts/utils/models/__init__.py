"""Models: loading, new rows, adapters, the loss over large vocabularies, quantising, longer windows.

  loading            weights loaded or created, and in which precision, attention and quantisation
  new_rows           embeddings and head of a model whose vocabulary grew
  training_model     the model that is trained: checked, loaded, grown, with its adapter; its size and FLOPs
  dropout            dropout of adapters, quick on CPUs too
  lm_loss            losses over the vocabulary, computed in chunks: logits of all positions never exist at once
  sequence_parallel  one row over several processes, each with a part of its tokens, by exchanging heads
  gathering          weights that DeepSpeed ZeRO-3 or FSDP spread over the processes, gathered for a while
  experts            mixtures of experts as linear layers, where they get LoRA or 4 bits; what their balancing loss
                     counts
  quantization       a full-precision model made smaller, saved as a folder that transformers (and vLLM) load
  rope               windows longer than the trained one, by transformers' own rope_parameters, and rotations that
                     differ by row

Others import: loading, new_rows, training_model, lm_loss, sequence_parallel, gathering, experts, quantization, rope.
"""
