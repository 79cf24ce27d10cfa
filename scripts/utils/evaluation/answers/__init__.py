"""Answers to open questions that have a reference, scored and compared. Only its script imports it.

  scores      how near an answer comes to its reference: exact, contained, the number, ROUGE-L, chrF
  comparison  means with intervals, and what changed from one model to the next

Others import: scores, comparison.
"""
