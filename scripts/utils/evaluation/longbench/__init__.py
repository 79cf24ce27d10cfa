"""LongBench: questions on long texts. Only its script imports it.

  tasks    what is asked, how long an answer may be, and what it is measured by
  prompts  what is asked of an engine, as token ids that leave room for the answer
  metrics  how near an answer comes to the right one, 0-1
  results  answers written as they come, their scores, averages and picture

Others import: tasks, prompts, results.
"""
