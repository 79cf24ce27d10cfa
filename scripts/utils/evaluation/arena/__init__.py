"""The arena: blind battles, votes, ratings and a model as judge. Of the scripts arena.py alone imports it, and
eval_answers.py, which asks the same players and has the same judge.

  votes        what was said of two models' answers, in a file of votes that no crash loses, and that counts each
               once
  matchmaking  the questions that models are asked side by side, and who meets whom over which of them
  players      what takes part in an arena. Models loaded here, files of answers, OpenAI-compatible servers
  ratings      how strong models are, by who beat whom. Bradley-Terry and Elo with bootstrap intervals, win rates,
               pairs
  judging      a model behind an OpenAI-compatible server says which of two answers is better, in both orders
  texts        what the page says, in Chinese and English
  page         two models without names answer side by side, a vote, who they were; and a page of results

Others import: votes, matchmaking, players, ratings, judging, page.
"""
