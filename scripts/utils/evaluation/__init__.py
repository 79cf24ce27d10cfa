"""Evaluation: intervals, resumable progress, which model answered, likelihoods, perplexity, alignment, contamination,
  formats.

  intervals      how far a figure measured on a sample can be trusted
  plots          Perplexity on the screen and in pictures: a table, a curve by length, bits a byte with their
                 intervals
  progress       files of answers, or of parts of a result, that are written as these come, and go on where a run was
                 killed; the loop that answers
  models         which weights answered, what a model is called; the candidates that perplexity compares
  endpoints      models behind OpenAI-compatible servers, asked through the official client
  likelihood     texts cut so that a model whose context is limited scores each token once, and the losses of windows
  perplexity     how well a model predicts texts, by document or by the position of the predicted token
  alignment      questions about right and wrong, what an answer says to them, and the share of right ones
  contamination  which questions of a benchmark stand, in whole or in part, in files of training data
  rolling_hash   characters folded, text cut into units, and hashes of n-grams of units
  formats        what a model becomes in each way of storing it: size, perplexity, bits per byte, time of a token
  result_files   what the JSON of each evaluation holds, for the script that writes it and for whoever reads it
  arguments      how answers are drawn where they are judged
  banks          questions of files of records, each under an id of its own

Others import: intervals, plots, progress, models, endpoints, likelihood, perplexity, alignment, contamination,
formats, result_files, arguments, banks, rolling_hash.
"""
