"""Figures of a running worker: counted on the host, named as metrics, published at intervals. Imports no SGLang."""
