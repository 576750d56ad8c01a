"""What runs keep on the disk and read back: folder, states, models, masks. For other programs: export."""
