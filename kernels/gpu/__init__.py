"""Triton kernels, one file per family, behind the ops of the files one level up. ``launch.py`` says where they run."""
