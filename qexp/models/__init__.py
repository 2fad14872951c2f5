"""Classifiers: SmallNet and torchvision's, with normalisation inside; their weights files and stored forms.

Feeds every other package.
"""
