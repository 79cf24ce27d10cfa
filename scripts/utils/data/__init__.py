"""Data: caches of tokens, corpora, samples and preference pairs, packed, mixed and batched.

  arguments    flags of pt.py and sft.py: how text and conversations become rows
  cache        memory-mapped files of tokens, keyed by content and settings; complete or absent, built once, by one
               builder for every kind of cache
  corpora      which files, their text tokenised once into token caches, and the validation split
  samples      conversations tokenised once, with what is trained marked, into token caches
  blocks       corpora and samples cut into rows whose documents do not see each other; mixing, packing
  preferences  Preference pairs and prompts for reward models, PPO and DPO: records -> messages -> token caches
  batches      rows padded to the longest, both answers of a pair in one row, and which rows make a batch
  questions    questions with reference answers, in the layouts of conversations: asked, not learnt from
  sources      the arguments of a run -> the caches of its data, what is trained on and what is held out
  self_instruct  tasks that a model writes after the example of others, read from its answer, and kept where new

Others import: arguments, cache, corpora, samples, blocks, preferences, batches, questions, sources, self_instruct.
"""
