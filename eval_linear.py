"""Evaluates a frozen backbone: on labeled images, and with pictures and features that need no labels.

    python eval_linear.py --workdir=DIR                     a run, with the original's linear-evaluation protocol
    python eval_linear.py --pretrained=FILE.pth.tar ...     a PyTorch checkpoint, or an Orbax checkpoint (a folder)
    ... --pretrained=FILE --prefix=backbone.                another library's checkpoint, whose names have that prefix
    ... --config.linear.lr=1,3,10,30                        several classifiers at once; reports the best
    ... --fast                                              minutes instead of hours: stored features of a few views
    ... --knn                                               k nearest neighbors (Wu et al. 2018), without training
    ... --diagnostics                                       alignment, uniformity, effective rank, similarities
    ... --features=FILE.npz [--split=train] [--layer=projection]     writes the features, with labels and names
    ... --map=FILE.png                                      draws the features in two dimensions, colored by label
    ... --neighbors=FILE.png                                draws some images with the training images nearest to them

The last four need no labels. Where a source has no held-out images of its own, a tenth of its images is held out.
With --workdir, the evaluation uses the run's own config, and --config.field=value changes a field of it. With
--pretrained, the network follows from the file's tensors; --config=FILE.py or --config.data.source=... selects the
images. Results go into results.json in the workdir or in --output. The same command resumes a stopped evaluation.
"""

if __name__ == "__main__":
    from ifm_jax import process

    process.begin(hosts=True)  # first: what is imported below takes seconds

    from ifm_jax.cli import evaluate

    evaluate.run(__doc__)
