"""Converts checkpoints between PyTorch and JAX, and says what one holds.

    python convert_checkpoints.py to-jax FILE.pth.tar DIR       the original's checkpoint, or torchvision's, into DIR
    python convert_checkpoints.py to-jax FILE DIR --prefix=backbone.          another library's, under that prefix
    python convert_checkpoints.py to-torch DIR FILE.pth.tar     a run, as the original's code loads it
    python convert_checkpoints.py to-torch DIR FILE.pth --for=torchvision     its backbone, as torchvision's ResNet
    python convert_checkpoints.py inspect PATH                  what a file or a run holds

DIR is laid out as the working directory of a run: whatever takes one takes it. A name that ends in .safetensors writes
that format. MoCo's own scripts, that for detectron2 among them, read what the default, --for=moco, writes. Nothing in a
file is executed. Existing output is refused without --overwrite.
"""

if __name__ == "__main__":
    from ifm_jax import process

    process.begin()  # first: what is imported below takes seconds

    from ifm_jax.cli import convert

    convert.run(__doc__)
