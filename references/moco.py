"""The original's training step in PyTorch: the peer that every trajectory here is compared with.

MoCo-v2 with implicit feature modification as the original computes it on W processes under DistributedDataParallel,
emulated in one process: each rank's samples pass the encoders on their own, so that BatchNorm sees what it would see
there. `references/moco_ddp.py` runs the same steps as W real processes; `tests/test_torch_reference.py` holds the
two together.

    reference = Reference("resnet18", dim=16, queue_size=32, world=2, method="ifm", epsilon=0.1)
    reference.save_checkpoint("start.pth.tar")
    results = reference.run(random_views(steps=5, n=8, size=64, world=2, seed=0), lr_per_step=0.03)
    np.savez("reference.npz", **results)

Float64 by default: in float32 two runs that differ in one rounding drift apart within a few steps.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ifm_jax.models.resnet import ARCHITECTURES, Architecture
from references.torchvision_peer import torchvision

METHODS = ("moco", "ifm", "ifm_only")

# Wrong variants of the step. A comparison that does not notice one of them does not cover that point.
MUTATIONS = frozenset(
    {
        "epsilon_after_temperature",  # epsilon on the scaled logits
        "epsilon_sign",  # positive raised, negatives lowered: the easier problem
        "alpha_not_normalized",  # loss_clean + alpha loss_ifm, not divided by 1 + alpha
        "accuracy_from_shifted",  # acc1, acc5 from the logits with epsilon
        "enqueue_before_loss",  # this step's keys are among the negatives
        "queue_order",  # keys enqueued in the order the key encoder saw them
        "no_shuffle",  # key images keep their rank
        "inverse_shuffle",  # the permutation read the wrong way round
        "key_encoder_eval",  # key encoder normalizes with its running statistics
        "one_batch_norm",  # statistics over the global batch
        "mean_running_statistics",  # statistics of all ranks averaged, instead of rank 0's
        "biased_running_variance",  # running variance from the biased batch variance
        "bn_momentum",  # running average 0.99 old + 0.01 batch
        "bn_eps_1e-3",  # BatchNorm epsilon 1e-3
        "late_momentum",  # keys computed before the momentum update
        "momentum_after_step",  # momentum update last, from the query parameters after the step
        "momentum_update_buffers",  # running statistics averaged along with the parameters
        "nesterov",  # Nesterov momentum
        "gradient_sum",  # gradients summed over ranks
        "no_decay_on_norm_and_bias",  # weight decay on matrices and kernels only
        "decoupled_decay",  # weight decay past the momentum buffer
    }
)


class ReferenceMoCo(nn.Module):
    """Two encoders and the key queue, under the names of the original's checkpoints.

    Attributes:
        encoder_q: query encoder, a torchvision ResNet with `dim` outputs.
        encoder_k: key encoder, a copy of the query encoder at the start; its parameters take no gradient.
        queue: `(dim, K)` buffer of keys, each column of unit length.
        queue_ptr: `(1,)` int64 buffer, the column where the next keys go.
    """

    def __init__(
        self, arch: str = "resnet18", dim: int = 128, queue_size: int = 65536, mlp: bool = True, width: int = 64
    ):
        super().__init__()
        self.encoder_q = _encoder(arch, dim, mlp, width)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))


def resnet(arch: str, num_classes: int, width: int = 64) -> nn.Module:
    """Returns torchvision's ResNet of that name; with another `width`, all its channels times width / 64."""
    if width == 64:
        return torchvision.models.get_model(arch, num_classes=num_classes)
    return _Narrow(ARCHITECTURES[arch], num_classes, width)


class _Narrow(torchvision.models.resnet.ResNet):
    """torchvision's class and blocks, asked for fewer channels."""

    def __init__(self, arch: Architecture, num_classes: int, width: int):
        self.width = width
        blocks = torchvision.models.resnet
        super().__init__(
            blocks.Bottleneck if arch.bottleneck else blocks.BasicBlock,
            list(arch.depths),
            groups=arch.groups,
            width_per_group=arch.width_per_group,
        )
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(self.fc.in_features * width // 64, num_classes)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        if planes == 64:
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, blocks, stride, dilate)


def _encoder(arch: str, dim: int, mlp: bool, width: int) -> nn.Module:
    network = resnet(arch, dim, width)
    if mlp:
        features = network.fc.in_features
        network.fc = nn.Sequential(nn.Linear(features, features), nn.ReLU(), network.fc)
    return network


class _BiasedBatchNorm(nn.BatchNorm2d):
    """The mutation `biased_running_variance`."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            self.num_batches_tracked += 1
            variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


class Reference:
    """The original's training, W ranks emulated in one process.

    Initial weights are drawn in float32 and then widened, so that a start checkpoint loses nothing in either type.
    After a step `model.encoder_q`'s `.grad` hold the gradient averaged over ranks, without weight decay.

    Args:
        arch: a torchvision ResNet's name.
        dim: size of an embedding.
        queue_size: K; must be a multiple of the global batch.
        mlp: MoCo-v2's projection head instead of a single linear layer.
        width: channels of the network's first stage; see `resnet`.
        world: W, number of ranks.
        method: `"moco"` (InfoNCE), `"ifm"` (both, weighted) or `"ifm_only"` (shifted InfoNCE).
        epsilon: the shift, subtracted from the positive's similarity and added to the negatives'.
        alpha: weight of the shifted loss in `"ifm"`.
        temperature: of the softmax.
        momentum: of the key encoder.
        lr: learning rate where `run` is given none.
        weight_decay: L2 penalty on every query parameter.
        sgd_momentum: of the optimizer.
        dtype: of parameters, statistics, queue and arithmetic.
        seed: of the initial weights and queue.
        mutations: names out of `MUTATIONS`.

    Raises:
        ValueError: unknown method or mutation.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        dim: int = 128,
        queue_size: int = 65536,
        mlp: bool = True,
        *,
        width: int = 64,
        world: int = 1,
        method: str = "ifm",
        epsilon: float = 0.1,
        alpha: float = 1.0,
        temperature: float = 0.2,
        momentum: float = 0.999,
        lr: float = 0.03,
        weight_decay: float = 1e-4,
        sgd_momentum: float = 0.9,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        mutations: frozenset[str] = frozenset(),
    ):
        if method not in METHODS:
            raise ValueError(f"method is {method!r}, expected one of {METHODS}")
        if unknown := set(mutations) - MUTATIONS:
            raise ValueError(f"unknown mutations {sorted(unknown)}, known are {sorted(MUTATIONS)}")
        self.arch, self.world, self.method = arch, world, method
        self.epsilon, self.alpha, self.temperature = epsilon, alpha, temperature
        self.momentum, self.lr, self.dtype = momentum, lr, dtype
        self.mutations = frozenset(mutations)
        self.groups = 1 if "one_batch_norm" in mutations else world
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = ReferenceMoCo(arch, dim, queue_size, mlp, width).to(dtype).train()
        self._mutate_networks()
        self.weight_decay = weight_decay
        decays = "decoupled_decay" not in mutations
        self.optimizer = torch.optim.SGD(
            self._parameter_groups(),
            lr,
            momentum=sgd_momentum,
            weight_decay=weight_decay if decays else 0.0,
            nesterov="nesterov" in mutations,
        )

    def _mutate_networks(self):
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-3 if "bn_eps_1e-3" in self.mutations else module.eps
                module.momentum = 0.01 if "bn_momentum" in self.mutations else module.momentum
                if "biased_running_variance" in self.mutations:
                    module.__class__ = _BiasedBatchNorm
        if "key_encoder_eval" in self.mutations:
            self.model.encoder_k.eval()

    def _parameter_groups(self) -> list[Any]:
        """All parameters, the key encoder's too: they are numbered in a checkpoint but never get a gradient."""
        parameters = list(self.model.parameters())
        if "no_decay_on_norm_and_bias" not in self.mutations:
            return parameters
        vectors = [p for p in parameters if p.ndim == 1]
        return [{"params": [p for p in parameters if p.ndim > 1]}, {"params": vectors, "weight_decay": 0.0}]

    def run(self, views: dict[str, np.ndarray], lr_per_step: Sequence[float] | float | None = None) -> dict:
        """Trains on recorded views, one step each.

        Args:
            views: `query` and `key` of shape `(steps, N, H, W, 3)`; `permutation`, int `(steps, N)`: place i of the
                shuffled key images holds `key[permutation[i]]`; optional `lr`, `(steps,)`.
            lr_per_step: a learning rate, or one a step; None takes the views' `lr`, or else the constructor's.

        Returns:
            Arrays as in a replay's reference file. `loss`, `loss_clean`, `loss_ifm`, `acc1`, `acc5` (percent) are means
            over the global batch, `grad_norm` the norm of the averaged gradient without weight decay, `queue_ptr` the
            pointer after the step, each `(steps,)`; `loss_ifm` is computed whatever the method. `first/query` and
            `first/key`: the first step's normalized embeddings `(N, dim)` in sample order. `final/<name>`: the state.
        """
        steps = len(views["query"])
        lr = views.get("lr", self.lr) if lr_per_step is None else lr_per_step
        lr = np.broadcast_to(np.asarray(lr), (steps,))
        results: dict[str, list] = {}
        for step in range(steps):
            query, key = (
                torch.from_numpy(np.ascontiguousarray(np.moveaxis(views[name][step], -1, 1))).to(self.dtype)
                for name in ("query", "key")
            )
            permutation = torch.from_numpy(np.asarray(views["permutation"][step], np.int64))
            metrics, embeddings = self.step(query, key, permutation, float(lr[step]))
            for name, value in metrics.items():
                results.setdefault(name, []).append(value)
            if step == 0:
                first = {f"first/{name}": value.numpy() for name, value in embeddings.items()}
        final = {f"final/{name}": value.numpy().copy() for name, value in self.model.state_dict().items()}
        return {name: np.asarray(values) for name, values in results.items()} | first | final

    def step(
        self, query: torch.Tensor, key: torch.Tensor, permutation: torch.Tensor, lr: float
    ) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """One update on `(N, 3, H, W)` views; returns the metrics, and the embeddings `(N, dim)` in sample order."""
        N, K = len(query), self.model.queue.shape[1]
        if N % self.world or K % N:
            raise ValueError(f"batch {N} must be a multiple of world {self.world} and divide the queue's {K}")
        early = self.mutations.isdisjoint({"late_momentum", "momentum_after_step"})

        # 1. The key parameters move, from the query parameters before this step.
        if early:
            self._momentum_update()

        # 2. Keys: shuffled over the ranks, so that a key's BatchNorm companions are not its query's; then put back.
        order = permutation
        if "no_shuffle" in self.mutations:
            order = torch.arange(N)
        elif "inverse_shuffle" in self.mutations:
            order = torch.argsort(permutation)
        with torch.no_grad():
            shuffled = torch.cat([F.normalize(k, dim=1) for k in self._ranks(self.model.encoder_k, key[order])])
        keys = torch.empty_like(shuffled)
        keys[order] = shuffled
        if "late_momentum" in self.mutations:
            self._momentum_update()

        # 3. The loss, against the queue without these keys. A rank's loss is the mean over its own samples, the
        #    gradient the mean over ranks.
        enqueued = shuffled if "queue_order" in self.mutations else keys
        if "enqueue_before_loss" in self.mutations:
            self._enqueue(enqueued)
        self.optimizer.zero_grad(set_to_none=False)
        totals: dict[str, float] = {}
        queries = []
        of_rank = keys.chunk(self.groups)
        for k, q in zip(of_rank, self._ranks(self.model.encoder_q, query), strict=True):
            q = F.normalize(q, dim=1)
            loss, metrics = self._loss(q, k)
            (loss if "gradient_sum" in self.mutations else loss / self.groups).backward()
            queries.append(q.detach())
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value / self.groups

        # 4. The update.
        gradients = [p.grad for p in self.model.encoder_q.parameters()]
        totals["grad_norm"] = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if "decoupled_decay" in self.mutations:
            with torch.no_grad():
                torch._foreach_mul_(list(self.model.encoder_q.parameters()), 1 - lr * self.weight_decay)
        self.optimizer.step()

        # 5. The keys enter the queue.
        if "enqueue_before_loss" not in self.mutations:
            self._enqueue(enqueued)
        if "momentum_after_step" in self.mutations:
            self._momentum_update()
        totals["queue_ptr"] = int(self.model.queue_ptr)
        return totals, {"query": torch.cat(queries), "key": keys}

    def _ranks(self, encoder: nn.Module, images: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields the encoder's output for each rank's images.

        Every rank starts from rank 0's running statistics, and rank 0's are what remains. A rank's backward pass has
        to come before the next rank is asked for, since that overwrites buffers.
        """
        buffers = list(encoder.buffers())
        before, after = [b.clone() for b in buffers], []
        for chunk in images.chunk(self.groups):
            _assign(buffers, before)
            yield encoder(chunk)
            after.append([b.clone() for b in buffers])
        if "mean_running_statistics" in self.mutations:
            _assign(buffers, [torch.stack(b).double().mean(0).to(b[0].dtype) for b in zip(*after, strict=True)])
        else:
            _assign(buffers, after[0])

    def _loss(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """One rank's objective, and its metrics, from normalized embeddings `(N/W, dim)`."""
        positive = torch.einsum("nd,nd->n", q, k)[:, None]
        negative = torch.einsum("nd,dk->nk", q, self.model.queue.clone())
        epsilon = -self.epsilon if "epsilon_sign" in self.mutations else self.epsilon
        logits = torch.cat([positive, negative], dim=1) / self.temperature
        if "epsilon_after_temperature" in self.mutations:
            shifted = torch.cat([logits[:, :1] - epsilon, logits[:, 1:] + epsilon], dim=1)
        else:
            shifted = torch.cat([positive - epsilon, negative + epsilon], dim=1) / self.temperature
        target = torch.zeros(len(q), dtype=torch.int64)
        clean, ifm = F.cross_entropy(logits, target), F.cross_entropy(shifted, target)
        if self.method == "moco":
            loss = clean
        elif self.method == "ifm_only":
            loss = ifm
        else:
            loss = clean + self.alpha * ifm
            loss = loss if "alpha_not_normalized" in self.mutations else loss / (1 + self.alpha)
        metrics = {"loss": loss.item(), "loss_clean": clean.item(), "loss_ifm": ifm.item()}
        ranked = shifted if "accuracy_from_shifted" in self.mutations else logits
        above = (ranked[:, 1:] > ranked[:, :1]).sum(1)
        for top in (1, 5):
            metrics[f"acc{top}"] = 100.0 * (above < top).double().mean().item()
        return loss, metrics

    @torch.no_grad()
    def _momentum_update(self):
        query, key, m = self.model.encoder_q, self.model.encoder_k, self.momentum
        pairs = list(zip(query.parameters(), key.parameters(), strict=True))
        if "momentum_update_buffers" in self.mutations:
            pairs += [(q, k) for q, k in zip(query.buffers(), key.buffers(), strict=True) if k.is_floating_point()]
        for q, k in pairs:
            k.mul_(m).add_(q * (1 - m))

    @torch.no_grad()
    def _enqueue(self, keys: torch.Tensor):
        at, K = int(self.model.queue_ptr), self.model.queue.shape[1]
        self.model.queue[:, at : at + len(keys)] = keys.T
        self.model.queue_ptr[0] = (at + len(keys)) % K

    def save_checkpoint(self, path, epoch: int = 0):
        """Writes the state as the original does: names under `module.`, momentum buffers of the query parameters."""
        state = {f"module.{name}": value for name, value in self.model.state_dict().items()}
        optimizer = self.optimizer.state_dict()
        torch.save({"epoch": epoch, "arch": self.arch, "state_dict": state, "optimizer": optimizer}, path)

    def load_checkpoint(self, path) -> int:
        """Goes on from a checkpoint in the original's format; returns its epoch."""
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict({k.removeprefix("module."): v for k, v in checkpoint["state_dict"].items()})
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        return checkpoint["epoch"]


def _assign(buffers: list[torch.Tensor], values: list[torch.Tensor]):
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


def learning_rate(
    base: float, epoch: int, epochs: int, schedule: str = "cosine", milestones: Sequence[int] = (120, 160)
) -> float:
    """The learning rate of an epoch (counted from 0): `"cosine"`, or `"step"`, times 0.1 at each milestone reached."""
    if schedule == "cosine":
        return base * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))
    if schedule == "step":
        for milestone in milestones:
            base *= 0.1 if epoch >= milestone else 1.0
        return base
    raise ValueError(f'schedule is {schedule!r}, expected "cosine" or "step"')


def random_views(steps: int, n: int, size: int, world: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """Recorded views to train on: smooth random images, about standard normal, a key being a disturbed query.

    Args:
        steps: number of steps.
        n: global batch, a multiple of `world`.
        size: pixels a side, at least 8. At 32 a torchvision ResNet ends in a 1x1 map, and with two samples a rank
            BatchNorm there leaves only signs: take 64 then, or more samples.
        world: number of ranks; every permutation moves some sample to another rank if there is more than one.
        seed: of everything here.

    Returns:
        `query`, `key`: float64 `(steps, n, size, size, 3)`; `permutation`: int64 `(steps, n)`.
    """
    if n % world:
        raise ValueError(f"batch {n} must be a multiple of world {world}")
    rng = np.random.default_rng(seed)

    def smooth(cells):
        coarse = torch.from_numpy(rng.standard_normal((steps * n, 3, cells, cells)))
        fine = F.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)
        return (fine / fine.std()).numpy().reshape(steps, n, 3, size, size)

    def noisy(images):
        return np.ascontiguousarray(np.moveaxis(0.9 * images + 0.4 * smooth(size // 4), 2, -1))

    scene = smooth(4)
    permutation = np.stack([rng.permutation(n) for _ in range(steps)])
    rank = np.arange(n) // (n // world)
    for row in permutation:
        while world > 1 and n > 1 and (rank[row] == rank).all():
            rng.shuffle(row)
    return {"query": noisy(scene), "key": noisy(scene), "permutation": permutation.astype(np.int64)}
