"""Guest disks: squashfs images and ext4 overlays."""

SQUASHFS, EXT4 = "squashfs", "ext4"  # the kinds of filesystem that images have
