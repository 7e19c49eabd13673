"""Plots and HTML contact sheets from results. Nothing is read or written but the file asked for."""

from cir_core.reporting.contact_sheet import (
    SheetColumn,
    SheetResult,
    SheetRow,
    contact_sheet_rows,
    image_ids_of,
    write_contact_sheet,
)
from cir_core.reporting.plots import alpha_curve, training_curves

__all__ = [
    "SheetColumn",
    "SheetResult",
    "SheetRow",
    "alpha_curve",
    "contact_sheet_rows",
    "image_ids_of",
    "training_curves",
    "write_contact_sheet",
]
