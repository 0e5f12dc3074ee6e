"""ZeRO updates a parameter that a step did not reach with the gradient of an earlier step. README.md says why.

    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 reproduce.py [--mend [term | set_local_grad]]
    DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 reproduce.py

Two linear layers and plain SGD. Step 1 runs both layers; in step 2 some micro-batches run the lower one only. PyTorch
alone says how far the upper layer has to move in step 2; the table says how far it moved in each configuration.
Exit code: 0 all is right, 1 something is not.
"""

import argparse
import logging
import sys
import warnings

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

LR = 0.1
INPUTS = torch.linspace(-1, 1, 8)[None]  # (1, 8): the same on every rank and in every micro-batch
CPU = {"device": "cpu"}
CONFIGURATIONS = {
    "zero1": {"stage": 1},
    "zero1, optimizer offload": {"stage": 1, "offload_optimizer": CPU},
    "zero2": {"stage": 2},
    "zero2, optimizer offload": {"stage": 2, "offload_optimizer": CPU},
    "zero3": {"stage": 3},
    "zero3, optimizer offload": {"stage": 3, "offload_optimizer": CPU},
    "zero3, both offload": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
}
# Which micro-batches of step 2 run the upper layer. All of step 1 do.
CASES = {"none of 1": [False], "2nd of 2 only": [False, True], "1st of 2 only": [True, False]}


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.lower = nn.Linear(8, 8, bias=False)
        self.upper = nn.Linear(8, 8, bias=False)

    def forward(self, inputs, use_upper):
        states = self.lower(inputs)
        return (self.upper(states) if use_upper else states).square().mean()


def start(zero, micro_batches):
    torch.manual_seed(0)
    model = TwoLayers()
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": micro_batches}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}  # PyTorch's SGD everywhere
    config |= {"gradient_clipping": 0.0, "zero_optimization": zero}  # clipping is on by default
    return deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=LR), config=config)[0]


def take_step(engine, plan, mend):
    parameters = list(engine.module.parameters())
    if mend == "set_local_grad":  # ZeRO-3 only
        for p in parameters:
            deepspeed.utils.safe_set_local_grad(p, torch.zeros_like(p.ds_tensor))
    for use_upper in plan:
        loss = engine(INPUTS.to(engine.device), use_upper)
        if mend == "term":  # in every micro-batch; under ZeRO-1 and 2 nothing is gathered
            with deepspeed.zero.GatheredParameters(parameters):
                engine.backward(loss + 0.0 * sum(p.sum() for p in parameters))
        else:
            engine.backward(loss)
        engine.step()


def weights(engine):
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: p.detach().cpu().clone() for name, p in engine.module.named_parameters()}


def right_move(before, plan):
    """How a step of plain PyTorch moves the upper layer."""
    model = TwoLayers()
    model.load_state_dict(before)
    torch.stack([model(INPUTS, use_upper) for use_upper in plan]).mean().backward()
    gradient = model.upper.weight.grad
    return torch.zeros(8, 8) if gradient is None else -LR * gradient


def run(zero, plan, mend):
    """How far the upper layer moved in step 2, how far is right, how far it moved in step 1, and what to call it."""
    engine = start(zero, len(plan))
    both = [True] * len(plan)
    stale = right_move(weights(engine), both)
    take_step(engine, both, mend)
    before = weights(engine)
    right = right_move(before, plan)
    take_step(engine, plan, mend)
    moved = weights(engine)["upper.weight"] - before["upper.weight"]
    engine.destroy()
    names = {"right": right, "stale": right + stale, "stale, own lost": stale, "own lost": torch.zeros(8, 8)}
    name = next((name for name, move in names.items() if (moved - move).norm() < 1e-3 * stale.norm()), "wrong")
    return moved.norm().item(), right.norm().item(), stale.norm().item(), name


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mend", nargs="?", const="term", choices=["term", "set_local_grad"])
    parser.add_argument("--local_rank", type=int, help="the deepspeed launcher passes it")
    mend = parser.parse_args().mend
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    deepspeed.init_distributed()
    chosen = {name: zero for name, zero in CONFIGURATIONS.items() if mend != "set_local_grad" or zero["stage"] == 3}
    table = {name: [run(zero, plan, mend) for plan in CASES.values()] for name, zero in chosen.items()}
    rows = {"micro-batches of step 2 that reach it": list(CASES)}
    for title, column in {"right: lr x gradient of step 2": 1, "stale: lr x gradient of step 1": 2}.items():
        rows[title] = [f"{cell[column]:.4f}" for cell in table["zero3"]]
    rows |= {name: [f"{moved:.4f} {verdict}" for moved, _, _, verdict in cells] for name, cells in table.items()}
    if dist.get_rank() == 0:
        print("how far the upper layer moved in step 2")
        print("\n".join(f"{name:39}" + "".join(f"{cell:16}" for cell in row).rstrip() for name, row in rows.items()))
        sys.stdout.flush()
    dist.barrier()  # a launcher ends all ranks when the first fails
    dist.destroy_process_group()
    return int(any(verdict != "right" for cells in table.values() for *_, verdict in cells))


if __name__ == "__main__":
    sys.exit(main())
