"""Training: the arguments of a run, its output folder and resuming, the Trainer, curves.

  arguments  the arguments of a run, DeepSpeed configs made to fit, and what is measured
  runs       who may write into an output folder, what is resumed, and when a checkpoint or a run counts as complete
  trainer    chunked loss, complete checkpoints, evaluation in bits per byte, throughput
  plots      Curves of a run

Others import: arguments, runs, trainer, plots.
"""
