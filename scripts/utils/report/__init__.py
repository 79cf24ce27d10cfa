"""Report: charts, pages, the report of a recipe and the report on result files.

  charts        plain text that needs no scripts, no fonts and no files beside it
  pages         sections of text, tables and pictures, rendered as one self-contained HTML page and as Markdown
  stage_runner  commands of a recipe, run in order, alone or two side by side; their times and memory in a log
  recipe        the stages of a run folder, and what they left behind, read and checked
  run           what every stage cost and bought
  rlhf          the reward model, PPO and DPO, and what they did for alignment
  results       Result files of evaluations, whatever made them: read, checked, and told apart where they cannot be
                compared
  sections      Tables and pictures of evaluations, models as rows: a section for each benchmark
  evaluation    one page from any set of result files, with what the models were asked, and how
  answers       models' answers to one's own questions next to each other, with what changed
  summary       the figures that sum up a recipe's run: summary.json

Others import: stage_runner, run, results, evaluation, answers.
"""
