"""``fxopt bench``: how fast, in how much memory, and whether the tokens are the same.

A *contender* generates: stock Transformers, the model of ``fxopt.optimize``, or another program. A
*setting* is a size of job, and a *series* are settings for one table. ``measuring`` runs all contenders of
a setting in turns, and all settings of a series that grows along an axis, so that a machine that drifts
drifts under all of them alike. Each *entry* fills a *row*; ``results`` makes figures of them, which
``table``, ``records`` (CSV) and ``chart`` (SVG) show. ``lineup`` says who takes part: everybody, or the
passes added one after the other; ``growth`` chooses settings along one axis each.
"""
