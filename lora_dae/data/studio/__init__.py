"""The procedural studio: fashion photos with known attributes, drawn from a seed.

In the order in which a picture is made: ``attributes`` (what there is to know), ``captions``,
``patterns`` (cloth), ``pose`` (where the body is), ``garment`` (shape, drape), ``figure`` (people
and mannequins), ``scene`` (light, background, composition), ``dataset`` (rendered once, then read).
"""
