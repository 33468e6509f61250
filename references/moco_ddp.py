"""The steps of `references/moco.py` as W real processes under DistributedDataParallel, over gloo.

Here nothing is emulated: each process holds its own share of the batch, keys and key images travel through
`all_gather`, the permutation through `broadcast`, and the gradient's mean and the overwriting of buffers are DDP's own.
Only the container of the networks is shared with the emulation. From a checkpoint in the original's format:

    python -m references.moco_ddp --start=start.pth.tar --views=views.npz --out=out.npz --world=2 --queue-size=32
"""

import argparse

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from references import ranks
from references.moco import ReferenceMoCo


class DistributedMoCo(ReferenceMoCo):
    """One rank's part of the step up to the logits, communication included; its forward is what DDP wraps."""

    def __init__(self, options: argparse.Namespace):
        super().__init__(options.arch, options.dim, options.queue_size, options.mlp, options.width)
        self.options = options

    def forward(self, im_q: torch.Tensor, im_k: torch.Tensor, permutation: torch.Tensor):
        """Returns clean and shifted logits `(N/W, 1 + K)`, this rank's queries, and the keys of all ranks."""
        rank, world = dist.get_rank(), dist.get_world_size()
        q = F.normalize(self.encoder_q(im_q), dim=1)

        with torch.no_grad():
            for name, parameter in self.encoder_k.named_parameters():
                source = self.encoder_q.get_parameter(name)
                parameter.data = parameter.data * self.options.momentum + source.data * (1.0 - self.options.momentum)
            dist.broadcast(permutation, src=0)  # What the other ranks hold before is of no account.
            mine = permutation.reshape(world, -1)[rank]
            shuffled = F.normalize(self.encoder_k(gather(im_k)[mine]), dim=1)
            keys = gather(shuffled)[torch.argsort(permutation)]
        k = keys.reshape(world, len(im_q), -1)[rank]

        similarities = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone()], dim=1)
        shift = torch.full_like(similarities, self.options.epsilon)
        shift[:, 0] = -self.options.epsilon

        with torch.no_grad():
            start = self.queue_ptr.item()
            self.queue[:, start : start + len(keys)] = keys.t()
            self.queue_ptr.fill_((start + len(keys)) % self.queue.shape[1])
        return similarities / self.options.temperature, (similarities + shift) / self.options.temperature, q, keys


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """All ranks' tensors, one after the other along the first axis; no gradient."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def train(rank: int, store: str, options: argparse.Namespace):
    """One process."""
    ranks.join(rank, store, options)
    model = DistributedMoCo(options).double()
    if rank == 0:  # The others keep their own draw, until DDP's constructor makes all of them rank 0's.
        start = torch.load(options.start, weights_only=True)
        model.load_state_dict({name.split(".", 1)[1]: value for name, value in start["state_dict"].items()})
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(
        ddp.parameters(), options.lr, momentum=options.sgd_momentum, weight_decay=options.weight_decay
    )
    optimizer.load_state_dict(torch.load(options.start, weights_only=True)["optimizer"])
    ddp.train()

    views, steps, N, share = ranks.read_views(rank, options)
    results: dict[str, list] = {}
    first = {}
    for step in range(steps):
        im_q, im_k = (torch.tensor(views[name][step, share]).permute(0, 3, 1, 2).double() for name in ("query", "key"))
        permutation = torch.tensor(views["permutation"][step]) if rank == 0 else torch.zeros(N, dtype=torch.int64)
        logits, shifted, q, keys = ddp(im_q, im_k, permutation)
        clean, ifm = (x.logsumexp(1) - x[:, 0] for x in (logits, shifted))
        if options.method == "moco":
            loss = clean
        elif options.method == "ifm":
            loss = (clean + options.alpha * ifm) / (1 + options.alpha)
        else:
            loss = ifm
        for group in optimizer.param_groups:
            group["lr"] = float(views["lr"][step]) if "lr" in views else options.lr
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()

        best = logits.topk(5, dim=1).indices == 0
        rows = {"loss": loss, "loss_clean": clean, "loss_ifm": ifm}
        rows |= {f"acc{top}": 100.0 * best[:, :top].any(1).double() for top in (1, 5)}
        metrics = {name: gather(row).mean().item() for name, row in rows.items()}
        flat = torch.cat([p.grad.flatten() for p in ddp.module.encoder_q.parameters()])
        metrics |= {"grad_norm": torch.linalg.vector_norm(flat).item(), "queue_ptr": int(ddp.module.queue_ptr)}
        for name, value in metrics.items():
            results.setdefault(name, []).append(value)
        if step == 0:
            first = {"first/query": gather(q).numpy(), "first/key": keys.numpy()}

    ranks.finish(rank, options, ddp.module, results, first)


def main():
    """Reads the flags and runs the processes."""
    parser = ranks.parser(__doc__)
    parser.add_argument("--queue-size", type=int, required=True)
    parser.add_argument("--mlp", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--method", choices=("moco", "ifm", "ifm_only"), default="ifm")
    for name, value in {"epsilon": 0.1, "alpha": 1.0, "temperature": 0.2, "momentum": 0.999}.items():
        parser.add_argument(f"--{name}", type=float, default=value)
    ranks.start(train, parser.parse_args())


if __name__ == "__main__":
    main()
