"""Training: the arguments of a run, its output folder and resuming, the Trainer, curves.

  flags         Flags of transformers: those without meaning here, and values that would be refused only later
  arguments     the arguments of a run, DeepSpeed configs made to fit, and what is measured
  runs          who may write into an output folder, what is resumed, and when a checkpoint or a run counts as complete
  before_after  a few questions, answered by the weights that are trained: before the first step and after the last
  trainer       chunked loss, complete checkpoints, evaluation in bits per byte, throughput
  memory        what a run was planned to take and what it took: measured at its end, kept in a file that calibrates
                later plans
  plots         Curves of a run

Others import: flags, arguments, runs, before_after, trainer, memory, plots.
"""
