"""Adam without `torch.compile`: the same numbers, and no import that takes seconds."""

import subprocess
import sys
from pathlib import Path

import torch

from cl_ray.adam import Adam


def test_it_is_torch_s_to_the_last_bit() -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(3, 4) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    kinds = {ours: Adam, theirs: torch.optim.Adam}
    pairs = [(n, kind(n.parameters(), 0.01, (0.5, 0.9), fused=True)) for n, kind in kinds.items()]
    x = torch.randn(8, 3)
    for step in range(4):
        for network, optimizer in pairs:
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
        if step == 1:  # each goes on from the other's state
            states = [optimizer.state_dict() for _, optimizer in pairs]
            for (_, optimizer), state in zip(pairs, reversed(states), strict=True):
                optimizer.load_state_dict(state)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


def test_a_run_does_not_import_dynamo() -> None:
    code = (
        "import sys, torch; from helpers.five_steps import global_batch;"
        "from helpers.saved_states import small_gan; gan = small_gan();"
        "gan.train_step(global_batch(0, 'views')); gan.load_state_dict(gan.state_dict());"
        "print('torch._dynamo' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout == "False\n", done.stderr
