"""Images on the disk: folders of files, packed files, their pixels. Whether they are whole: checks."""
