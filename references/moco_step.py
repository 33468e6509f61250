"""The same training step in PyTorch: MoCo-v2 with IFM, on the networks that this package has, for the benchmarks.

One process, so that "shuffled BatchNorm over ranks" is left out on both sides (`bn_groups=1`); the views are made
beforehand. Two ways to run it: as published (float32, contiguous), and the strongest one (bfloat16 autocast,
channels_last, `torch.compile`, fused SGD, gradients set to None).
"""

import contextlib
import copy

import torch
from torch import nn
from torch.nn import functional as F

from ifm_jax.models.resnet import ARCHITECTURES


class _Block(nn.Module):
    """torchvision's basic block or bottleneck, without groups."""

    def __init__(self, in_features: int, features: int, stride: int, bottleneck: bool):
        super().__init__()
        out = features * (4 if bottleneck else 1)
        sizes = [(in_features, features, 1, 1), (features, features, 3, stride), (features, out, 1, 1)]
        if not bottleneck:
            sizes = [(in_features, features, 3, stride), (features, features, 3, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, k, s, k // 2, bias=False) for a, b, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _, _ in sizes)
        self.shortcut = nn.Identity()
        if stride != 1 or in_features != out:
            conv = nn.Conv2d(in_features, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x):
        y = x
        for conv, norm in zip(self.convs[:-1], self.norms[:-1], strict=True):
            y = F.relu(norm(conv(y)), inplace=True)
        return F.relu(self.norms[-1](self.convs[-1](y)) + self.shortcut(x), inplace=True)


class _Encoder(nn.Module):
    """A ResNet with MoCo-v2's head."""

    def __init__(self, arch: str, stem: str, dim: int):
        super().__init__()
        architecture = ARCHITECTURES[arch]
        width = architecture.width
        kernel, stride = {"imagenet": (7, 2), "small": (3, 1), "small_stride2": (5, 2)}[stem]
        layers = [nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
        if stem == "imagenet":
            layers.append(nn.MaxPool2d(3, 2, 1))
        features = width
        for stage, depth in enumerate(architecture.depths):
            for number in range(depth):
                stride = 2 if stage and not number else 1
                layers.append(_Block(features, width * 2**stage, stride, architecture.bottleneck))
                features = width * 2**stage * (4 if architecture.bottleneck else 1)
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        layers += [nn.Linear(features, features), nn.ReLU(True), nn.Linear(features, dim)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images):
        return F.normalize(self.layers(images), dim=1)


class Step:
    """A training step: `step(query, key)` takes images `(N, 3, H, W)`, float32, on its device.

    Args:
      arch: without groups and of width 64 a group.
      stem: as in this package.
      dim: of the embeddings.
      queue_size: K.
      method: "moco" or "ifm".
      best: bfloat16 autocast, channels_last and fused SGD, instead of what is published.
      compiled: `torch.compile` too.
      device: "cpu" or "cuda".
    """

    def __init__(
        self,
        arch: str,
        stem: str,
        dim: int,
        queue_size: int,
        method: str,
        best: bool,
        compiled: bool,
        device: str,
    ):
        torch.manual_seed(0)
        self._query = _Encoder(arch, stem, dim).to(device)
        if best:
            self._query = self._query.to(memory_format=torch.channels_last)
        self._key = copy.deepcopy(self._query)
        for parameter in self._key.parameters():
            parameter.requires_grad = False
        self._method, self._best, self._device = method, best, device
        self._queue = F.normalize(torch.randn(dim, queue_size, device=device), dim=0)
        self._place = 0
        # Fused on CUDA; on a CPU too, where this PyTorch has it.
        options = {"fused": True} if best else {}
        parameters = list(self._query.parameters())
        self._optimizer = torch.optim.SGD(parameters, 0.03, momentum=0.9, weight_decay=1e-4, **options)
        self._loss_of = torch.compile(self._loss) if compiled else self._loss

    def _loss(self, query, key):
        with torch.no_grad():
            keys = self._key(key)
        queries = self._query(query)
        positive = torch.einsum("nc,nc->n", queries, keys).unsqueeze(-1)
        negatives = torch.einsum("nc,ck->nk", queries, self._queue.clone().detach())
        zeros = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
        loss = F.cross_entropy(torch.cat([positive, negatives], 1).float() / 0.2, zeros)
        if self._method == "ifm":
            harder = torch.cat([positive - 0.1, negatives + 0.1], 1).float() / 0.2
            loss = (loss + F.cross_entropy(harder, zeros)) / 2
        return loss, keys

    def __call__(self, query, key) -> torch.Tensor:
        """Trains on one batch; returns the loss, still on the device."""
        with torch.no_grad():
            for of_key, of_query in zip(self._key.parameters(), self._query.parameters(), strict=True):
                of_key.mul_(0.999).add_(of_query, alpha=0.001)
        context = torch.autocast(self._device, torch.bfloat16) if self._best else contextlib.nullcontext()
        with context:
            loss, keys = self._loss_of(query, key)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        with torch.no_grad():
            self._queue[:, self._place : self._place + len(keys)] = keys.T.to(self._queue.dtype)
            self._place = (self._place + len(keys)) % self._queue.shape[1]
        return loss
