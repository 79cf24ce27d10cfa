"""Multiple choice: C-Eval, CMMLU, MMLU and files of the same form. Only its script imports it.

  subjects        how their files are called, their Chinese names, and their categories
  questions       what a row of a csv or jsonl file says, in the columns of the published benchmarks
  benchmarks      C-Eval, CMMLU, MMLU and one's own, from files as published or from a hub
  wordings        the wording of prompts for questions with choices, each under a name and a version
  prompts         text or messages by a preset's wording, token ids that fit the model's window
  scoring         how likely a model holds each of several continuations of a prompt
  scorers         a model loaded here, whatever its engine, or one behind a server
  answers         the choice that likelihoods speak for
  answer_reading  the letter that a written answer names, by a small grammar of Chinese and English
  runs            questions with choices put to a model or a server, each answer written as it comes
  results         Results of questions with choices, in percent: accuracy by subject and category, averages,
                  intervals, files

Others import: benchmarks, wordings, prompts, runs, results.
"""
