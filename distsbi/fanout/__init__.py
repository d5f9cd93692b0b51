"""Work spread over machines with Ray. The only folder that imports ray, and that at first use."""

from distsbi.fanout.catalog import CatalogResult, sample_catalog

__all__ = ["CatalogResult", "sample_catalog"]
