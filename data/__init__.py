"""Batches of images for a rank, from a position in a run to tensors on its device; knows of no model.

    position (epoch, batch)
      -> stream    which images, how they are cropped and flipped: drawn by (seed, epoch, step) alone
      -> source    datasets (arrays in memory) or images (files, packed files): the bytes and the labels
      -> backend   dali, torch_files or synthetic: decode, crop, resize, flip, ahead of the training step
      -> Batch     uint8 images in channels_last memory, and labels

The model normalises them, see trainer.models.classifier.
"""
