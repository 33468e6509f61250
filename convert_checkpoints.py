"""Converts checkpoints between PyTorch and JAX, and describes them.

    python convert_checkpoints.py to-jax FILE.pth.tar DIR       reads the original's or torchvision's checkpoint
    python convert_checkpoints.py to-jax FILE DIR --prefix=backbone.          another library's, with that prefix
    python convert_checkpoints.py to-torch DIR FILE.pth.tar     writes a run in the original's format
    python convert_checkpoints.py to-torch DIR FILE.pth --for=torchvision     its backbone, as torchvision's ResNet
    python convert_checkpoints.py to-torch DIR FOLDER --for=timm [--push=USER/REPO]      for timm and the hub
    python convert_checkpoints.py export DIR FILE               writes the backbone as a program that needs only JAX
    python convert_checkpoints.py inspect PATH                  describes the contents of a file or a run

DIR has the layout of a run's working directory, and is accepted wherever one is. A file name that ends in .safetensors
selects that format. With --for=timm, a name that ends in .pth, .pth.tar, .pt or .safetensors is a file, any other one a
folder, which timm loads as local-dir:FOLDER. MoCo's own scripts, including the one for detectron2, read what the
default, --for=moco, writes. Code in a file is never executed. Existing output is replaced only with --overwrite.
"""

if __name__ == "__main__":
    from ifm_jax import process

    process.begin()  # first: what is imported below takes seconds

    from ifm_jax.cli import convert

    convert.run(__doc__)
