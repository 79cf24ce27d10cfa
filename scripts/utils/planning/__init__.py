"""Planning: what a run will need, before it starts; no weights, no data.

  ledger   a rehearsal of one training step on tensors without numbers, and what is alive is summed up
  stages   what a training stage runs: its model on the meta device, one step of it, and the bytes that the step
           takes
  memory   a step's bytes, the optimizer, and what several processes share or add -> the peak of each process
  request  flags of a training command -> what is planned
  advice   settings that fit a GPU, what each saves or costs; time and price

Others import: memory, request, advice.
"""
