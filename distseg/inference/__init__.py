"""Inference: the model artefact, windows over volumes of any size, masks in the scan's own grid."""
