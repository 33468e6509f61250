"""SimCLR's training step in PyTorch, written from the paper: the peer that trajectories of `simclr` are compared with.

Chen et al. 2020 on W processes under DistributedDataParallel, with IFM (Robinson et al. 2021b) and hard negatives as
their released code has them (Robinson et al. 2021a): each rank has N/W images, both views of them pass the encoder in
one forward, so that a rank's BatchNorm sees its 2 N/W views; embeddings are gathered with their gradient, and the
gradient is that of the mean loss of all 2N queries. `SimCLRReference` emulates the ranks in one process; as real
processes over gloo, from a state dict:

    python -m references.simclr --start=start.pth --views=views.npz --out=out.npz --world=2

`tests/test_torch_simclr_reference.py` holds the two together.

    reference = SimCLRReference("resnet18", dim=16, world=2, objective="ifm", epsilon=0.1)
    start = reference.state()
    results = reference.run(random_views(steps=5, n=8, size=64), lr_per_step=0.03)
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from references import ranks
from references.moco import resnet

# Wrong variants of the step. A comparison that does not notice one of them does not cover that point.
MUTATIONS = frozenset(
    {
        "gathered_without_gradient",  # a rank's embeddings are constants to the other ranks' queries
        "views_apart",  # a forward pass, and so BatchNorm statistics, for each view
        "one_batch_norm",  # statistics over the views of all ranks
        "one_direction",  # the first views alone are queries
        "positive_among_negatives",  # the other view is among the negatives as well
        "weights_without_gradient",  # the weights of hard negatives are constants
    }
)


@dataclasses.dataclass(frozen=True)
class Loss:
    """What is minimized.

    Attributes:
        objective: `"infonce"`, `"ifm"` (both, weighted) or `"ifm_only"` (the shifted one).
        temperature: of the softmax.
        epsilon: IFM's shift, subtracted from the positive's similarity and added to the negatives'.
        alpha: weight of the shifted loss in `"ifm"`.
        beta: concentration on hard negatives.
        tau_plus: debiasing: the share of the negatives that are positives.
    """

    objective: str = "ifm"
    temperature: float = 0.5
    epsilon: float = 0.1
    alpha: float = 1.0
    beta: float = 0.0
    tau_plus: float = 0.0

    def __call__(
        self, queries: torch.Tensor, rows: torch.Tensor, everything: torch.Tensor, mutations: frozenset[str]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the mean loss of some queries, and the metrics of each.

        Args:
            queries: `(M, dim)` of unit length.
            rows: `(M,)`, where in `everything` they are.
            everything: `(2N, dim)`, all first views, then all second.
            mutations: names out of `MUTATIONS`.
        """
        number, N = len(everything), len(everything) // 2
        similarities = queries @ everything.T
        positive = similarities.gather(1, ((rows + N) % number)[:, None])[:, 0]
        distance = (torch.arange(number)[None] - rows[:, None]) % number
        keep = distance % N != 0  # neither the query itself nor its positive
        if "positive_among_negatives" in mutations:
            keep = distance != 0
        negative = similarities[keep].reshape(len(queries), -1)

        clean = self._of(positive, negative, mutations)
        ifm = self._of(positive - self.epsilon, negative + self.epsilon, mutations)
        loss = {"infonce": clean, "ifm": (clean + self.alpha * ifm) / (1 + self.alpha), "ifm_only": ifm}[self.objective]
        above = (negative > positive[:, None]).sum(1)
        metrics = {"loss": loss, "loss_clean": clean, "loss_ifm": ifm}
        metrics |= {f"acc{top}": 100.0 * (above < top).to(loss.dtype) for top in (1, 5)}
        return loss.mean(), {name: value.detach() for name, value in metrics.items()}

    def _of(self, positive: torch.Tensor, negative: torch.Tensor, mutations: frozenset[str]) -> torch.Tensor:
        if self.beta == 0 and self.tau_plus == 0:  # SimCLR's, as cross entropy
            logits = torch.cat([positive[:, None], negative], dim=1) / self.temperature
            return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64), reduction="none")
        # As in the released code of hard negatives.
        pos, neg = torch.exp(positive / self.temperature), torch.exp(negative / self.temperature)
        N = neg.shape[1]
        imp = (self.beta * neg.log()).exp()
        if "weights_without_gradient" in mutations:
            imp = imp.detach()
        reweight_neg = (imp * neg).sum(dim=-1) / imp.mean(dim=-1)
        Ng = (-self.tau_plus * N * pos + reweight_neg) / (1 - self.tau_plus)
        Ng = torch.clamp(Ng, min=N * np.e ** (-1 / self.temperature))
        return -torch.log(pos / (pos + Ng))


def encoder(arch: str, dim: int, head: str, width: int = 64) -> nn.Module:
    """Returns a torchvision ResNet with a projection head in the place of `fc`: "linear", "simclr" or "hcl"."""
    network = resnet(arch, dim, width)
    features = network.fc.in_features
    if head == "simclr":
        network.fc = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dim))
    elif head == "hcl":
        network.fc = nn.Sequential(
            nn.Linear(features, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, dim, bias=True)
        )
    elif head != "linear":
        raise ValueError(f'head is {head!r}, expected "linear", "simclr" or "hcl"')
    return network


class SimCLRReference:
    """SimCLR's training, W ranks emulated in one process.

    Initial weights are drawn in float32 and then widened. After a step the parameters' `.grad` hold the gradient of the
    mean loss of all queries, without weight decay.

    Args:
        arch: a torchvision ResNet's name.
        dim: size of an embedding.
        head: "simclr", "hcl" or "linear".
        width: channels of the network's first stage.
        start: a state dict under torchvision's names (head: `fc.*`), tensors or arrays; None: drawn from `seed`.
        world: W, number of ranks, each with its own BatchNorm statistics; rank 0's running averages are kept.
        lr: learning rate where `run` is given none.
        weight_decay: L2 penalty on every parameter.
        sgd_momentum: of the optimizer.
        dtype: of parameters, statistics and arithmetic.
        seed: of the initial weights.
        mutations: names out of `MUTATIONS`.
        **loss: of `Loss`: objective, temperature, epsilon, alpha, beta, tau_plus.

    Raises:
        ValueError: unknown head or mutation.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        dim: int = 128,
        head: str = "simclr",
        *,
        width: int = 64,
        start: Mapping[str, torch.Tensor | np.ndarray] | None = None,
        world: int = 1,
        lr: float = 0.03,
        weight_decay: float = 1e-4,
        sgd_momentum: float = 0.9,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        mutations: frozenset[str] = frozenset(),
        **loss,
    ):
        if unknown := set(mutations) - MUTATIONS:
            raise ValueError(f"unknown mutations {sorted(unknown)}, known are {sorted(MUTATIONS)}")
        self.world, self.lr, self.dtype, self.mutations = world, lr, dtype, frozenset(mutations)
        self.loss = Loss(**loss)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = encoder(arch, dim, head, width).to(dtype).train()
        if start is not None:
            self.model.load_state_dict({name: torch.as_tensor(value) for name, value in start.items()})
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr, momentum=sgd_momentum, weight_decay=weight_decay)

    def state(self) -> dict[str, np.ndarray]:
        """Returns a copy of the state dict, in PyTorch's names and layout."""
        return {name: value.numpy().copy() for name, value in self.model.state_dict().items()}

    def run(self, views: Mapping[str, np.ndarray], lr_per_step: Sequence[float] | float | None = None) -> dict:
        """Trains on recorded views, one step each.

        Args:
            views: `query` and `key`, the first and the second view, `(steps, N, H, W, 3)`; optional `lr`, `(steps,)`.
            lr_per_step: a learning rate, or one a step; None takes the views' `lr`, or else the constructor's.

        Returns:
            `loss`, `loss_clean`, `loss_ifm`, `acc1`, `acc5` (percent): means over the 2N queries, and `grad_norm`, the
            norm of the gradient without weight decay, each `(steps,)`. `first/query` and `first/key`: the first step's
            embeddings `(N, dim)`. `final/<name>`: the state.
        """
        steps = len(views["query"])
        lr = views.get("lr", self.lr) if lr_per_step is None else lr_per_step
        results: dict[str, list] = {}
        for step, rate in enumerate(np.broadcast_to(np.asarray(lr), (steps,))):
            metrics, everything = self.step(
                *(_images(views[name][step], self.dtype) for name in ("query", "key")), rate
            )
            for name, value in metrics.items():
                results.setdefault(name, []).append(value)
            if step == 0:
                first = dict(
                    zip(
                        ("first/query", "first/key"),
                        everything.numpy().copy().reshape(2, -1, everything.shape[1]),
                        strict=True,
                    )
                )
        final = {f"final/{name}": value for name, value in self.state().items()}
        return {name: np.asarray(values) for name, values in results.items()} | first | final

    def step(self, first: torch.Tensor, second: torch.Tensor, lr: float) -> tuple[dict[str, float], torch.Tensor]:
        """One update on both `(N, 3, H, W)` views; returns the metrics and the embeddings `(2N, dim)`."""
        groups = 1 if "one_batch_norm" in self.mutations else self.world
        if len(first) % groups:
            raise ValueError(f"batch {len(first)} must be a multiple of world {self.world}")
        parameters = dict(self.model.named_parameters())
        # Every rank starts from the running statistics of rank 0, which are what remains.
        of_rank, buffers = [], []
        for images in zip(first.chunk(groups), second.chunk(groups), strict=True):
            own = {name: value.clone() for name, value in self.model.named_buffers()}
            passes = images if "views_apart" in self.mutations else (torch.cat(images),)
            outputs = torch.cat([functional_call(self.model, parameters | own, (views,)) for views in passes])
            of_rank.append(F.normalize(outputs, dim=1).chunk(2))
            buffers.append(own)
        everything = torch.cat([torch.cat(view) for view in zip(*of_rank, strict=True)])

        N = len(first)
        rows = torch.arange(N if "one_direction" in self.mutations else 2 * N)
        loss, metrics = self.loss(everything[rows], rows, everything, self.mutations)
        if "gathered_without_gradient" in self.mutations:
            loss = 0.0
            for rank in range(self.world):
                own = torch.arange(2 * N).reshape(2, self.world, -1)[:, rank].reshape(-1)
                live = everything.detach().clone().index_copy(0, own, everything[own])
                loss = loss + self.loss(everything[own], own, live, self.mutations)[0] / self.world
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = float(lr)
        self.optimizer.step()
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[0][name])
        totals = {name: value.mean().item() for name, value in metrics.items()}
        return totals | {"grad_norm": _grad_norm(self.model)}, everything.detach()


def _images(views: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(views, -1, 1))).to(dtype)


def _grad_norm(model: nn.Module) -> float:
    return torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()])).item()


# --- Real processes --------------------------------------------------------------------------------------------------


class Gather(torch.autograd.Function):
    """All ranks' tensors, `(W, ...)`; back comes the sum of what all ranks' losses say of this rank's own."""

    @staticmethod
    def forward(ctx, tensor):
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def train(rank: int, store: str, options: argparse.Namespace):
    """One process; the gradient's mean and the broadcast of buffers are DistributedDataParallel's own."""
    ranks.join(rank, store, options)
    model = encoder(options.arch, options.dim, options.head, options.width).double()
    if rank == 0:  # The others keep their own draw, until DDP's constructor makes all of them rank 0's.
        model.load_state_dict(torch.load(options.start, weights_only=True))
    ddp = DistributedDataParallel(model).train()
    loss_of = Loss(**json.loads(options.loss))
    optimizer = torch.optim.SGD(
        ddp.parameters(), options.lr, momentum=options.sgd_momentum, weight_decay=options.weight_decay
    )
    views, steps, N, share = ranks.read_views(rank, options)
    rows = torch.arange(2 * N).reshape(2, N)[:, share].reshape(-1)
    results: dict[str, list] = {}
    for step in range(steps):
        images = torch.cat([_images(views[name][step, share], torch.float64) for name in ("query", "key")])
        queries = F.normalize(ddp(images), dim=1)
        # (W, 2, N/W, dim): the ranks' images one after the other, view by view.
        gathered = Gather.apply(queries.reshape(2, len(queries) // 2, -1))
        everything = gathered.transpose(0, 1).reshape(2 * N, -1)
        loss, metrics = loss_of(queries, rows, everything, frozenset())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = float(views["lr"][step]) if "lr" in views else options.lr
        optimizer.step()
        totals = {name: Gather.apply(value).mean().item() for name, value in metrics.items()}
        for name, value in (totals | {"grad_norm": _grad_norm(ddp.module)}).items():
            results.setdefault(name, []).append(value)
        if step == 0:
            first = dict(zip(("first/query", "first/key"), everything.detach().numpy().reshape(2, N, -1), strict=True))
    ranks.finish(rank, options, ddp.module, results, first)


def main():
    """Reads the flags and runs the processes."""
    parser = ranks.parser(__doc__)
    parser.add_argument("--head", choices=("linear", "simclr", "hcl"), default="simclr")
    parser.add_argument("--loss", default="{}", help="fields of Loss, as JSON")
    ranks.start(train, parser.parse_args())


if __name__ == "__main__":
    main()
