"""What people have on disk: folders of the diffusers layout and original single files. Config decides, never a name."""
