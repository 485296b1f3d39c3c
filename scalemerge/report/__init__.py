"""What a run left behind, read back and shown: terminal tables, Markdown, plots and one self-contained HTML page.

Ground floor: everything here works from the JSON files of a run folder, so a report can be made on a laptop that has
neither torch nor the models. matplotlib and jinja2 (extra `report`) are imported only when a figure or a page is made.
"""
