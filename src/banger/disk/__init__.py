"""Guest disks: squashfs images and ext4 overlays."""
