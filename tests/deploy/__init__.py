"""Tests of deploy/: manifests, images, scripts and guides."""
