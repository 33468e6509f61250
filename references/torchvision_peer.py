"""torchvision as a peer for the tests, importable beside a CPU-only torch too.

A torchvision wheel whose compiled operators do not fit the installed torch fails on import, because it describes
operators (`nms`, `qnms`) that nobody has declared. The networks and transforms used here need none of them, so the two
schemas are declared by hand, and only where the import fails without:

    from references.torchvision_peer import torchvision
"""

import sys
import warnings

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = None  # A torch.library.Library takes its schemas with it when it is collected, so it lives as long as this.


def _import():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Deprecations inside torchvision are not ours to mend.
        import torchvision
        import torchvision.models
        import torchvision.transforms
    return torchvision


try:
    torchvision = _import()
except (ImportError, RuntimeError, AttributeError) as error:
    if isinstance(error, ModuleNotFoundError) and error.name == "torchvision":
        raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # The half-imported package would be found again.
    _library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        _library.define(schema)
    torchvision = _import()

__all__ = ["torchvision"]
