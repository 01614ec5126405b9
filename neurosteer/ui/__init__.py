"""The page: a thin skin over the library, and the only importer of gradio."""
