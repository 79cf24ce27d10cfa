"""Data: caches of tokens, corpora, samples and preference pairs, packed, mixed and batched.

  cache        memory-mapped files of tokens, keyed by content and settings; complete or absent, built once
  corpora      which files, their text tokenised once into token caches, and the validation split
  samples      conversations tokenised once, with what is trained marked, into token caches
  blocks       corpora and samples cut into rows whose documents do not see each other, mixing, collating
  preferences  Preference pairs and prompts for reward models, PPO and DPO: records -> messages -> token caches
  batches      both answers of a pair in one row, behind the one prompt they share

Others import: cache, corpora, samples, blocks, preferences, batches.
"""
