"""RLHF: objectives, the reward model, rollouts, and the Trainers of rm.py, ppo.py and dpo.py.

  arguments       flags of rm.py, ppo.py and dpo.py: learning from pairs, how answers are sampled and rewarded, the
                  algorithm
  objectives      pure functions on log-probabilities, values, rewards and scores
  reward_model    a backbone with a scalar head, read at an answer's last token; loading one, and scoring with it
  actor_critic    the policy that is trained, and what estimates the rewards still to come
  rollouts        answers sampled from the policy, and what PPO learns from each of their tokens
  rewards         a reward model, a Python function, or both weighted; and how an answer ends
  reference       when it is the policy without its adapter, and its log-probabilities on disk
  pair_trainer    batches of pairs of about the same length, losses that are means over pairs
  dpo_trainer     the loss of a pair, its Trainer, and the curves of a run
  reward_trainer  the Trainer of rm.py, and the report on a reward model: accuracy, calibration, length bias
  ppo_trainer     the Trainer of ppo.py. A step is an iteration: sample answers, score them, then update actor and
                  critic on them

Others import: arguments, objectives, reward_model, actor_critic, rewards, reference, pair_trainer, dpo_trainer,
reward_trainer, ppo_trainer.
"""
