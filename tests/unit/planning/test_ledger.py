"""The rehearsal against sums made by hand."""

import torch
from torch import nn

from utils.planning.ledger import BOTTOM, FORWARD, TOP, Footprint, Moment, rehearse

ROWS, WIDTH, INNER = 64, 128, 256
FLOAT = 4


class Block(nn.Module):
    """Linear, ReLU, Linear."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, hidden):
        return self.down(torch.relu(self.up(hidden)))


class Checkpointed(Block):
    def forward(self, hidden):
        return torch.utils.checkpoint.checkpoint(super().forward, hidden, use_reentrant=False)


def rehearse_blocks(kind: type[Block], count: int, **settings) -> Footprint:
    with torch.device("meta"):
        model = nn.Sequential(*(kind() for _ in range(count)))
    options = {"layers": list(model), "autocast": None, "accumulates": False}
    return rehearse(model, lambda m: m(torch.empty(ROWS, WIDTH)).sum(), **(options | settings))


def test_weights_gradients_and_what_is_kept():
    blocks = 3
    step = rehearse_blocks(Block, blocks)
    weights = blocks * 2 * WIDTH * INNER * FLOAT
    assert (step.frozen, step.trained, step.gradients) == (0, weights, weights)
    assert step.num_trained == step.num_weights == weights / FLOAT
    # Each block keeps its input and the ReLU's result; besides there is the loss, and the last block's output.
    kept = blocks * ROWS * (WIDTH + INNER) * FLOAT
    assert kept <= step.kept <= kept + ROWS * WIDTH * FLOAT + 64


def test_checkpointing_keeps_inputs_alone():
    plain, checkpointed = rehearse_blocks(Block, 3), rehearse_blocks(Checkpointed, 3)
    assert 3 * ROWS * WIDTH * FLOAT <= checkpointed.kept <= 4 * ROWS * WIDTH * FLOAT + 64
    assert checkpointed.kept < plain.kept
    # One block is computed again at a time.
    assert checkpointed.moments[TOP].activations >= checkpointed.kept + ROWS * INNER * FLOAT


def test_autocast_keeps_half():
    # Products are of bfloat16: so are what they keep, and the copies of the weights they keep. That of the first is
    # not kept, since the batch gets no gradient.
    step = rehearse_blocks(Block, 2, autocast=torch.bfloat16)
    kept = (2 * ROWS * (WIDTH + INNER) + 3 * WIDTH * INNER) * 2
    assert kept <= step.kept <= kept + ROWS * WIDTH * (2 + FLOAT) * 2


def test_gradients_of_an_earlier_micro_batch_are_there_from_the_start():
    first, second = rehearse_blocks(Block, 2), rehearse_blocks(Block, 2, accumulates=True)
    assert first.moments[FORWARD].gradients == 0
    assert second.moments[FORWARD].gradients == second.gradients == first.gradients
    # A new gradient and the sum so far are there at once.
    assert second.moments[BOTTOM].activations >= WIDTH * INNER * FLOAT


def test_frozen_weights_have_no_gradients():
    def step(model):
        for parameter in model[0].parameters():
            assert not parameter.requires_grad
        return model(torch.empty(ROWS, WIDTH)).sum()

    with torch.device("meta"):
        model = nn.Sequential(Block().requires_grad_(False), Block())
    found = rehearse(model, step, layers=list(model), autocast=None, accumulates=False)
    assert found.frozen == found.trained == found.gradients == 2 * WIDTH * INNER * FLOAT


def test_more_layers_are_more_of_the_same():
    three, four, seven = (rehearse_blocks(Block, count) for count in (3, 4, 7))
    assert three.extended(four, 4) == seven


def test_a_footprint_is_a_line():
    one = Footprint(1, 2, 3, 4, 5, 6, 0, 7, {FORWARD: Moment(1, 10)})
    two = Footprint(2, 2, 3, 6, 5, 8, 0, 7, {FORWARD: Moment(1, 15)})
    assert one.extended(two, 3) == Footprint(4, 2, 3, 10, 5, 12, 0, 7, {FORWARD: Moment(1, 25)})
