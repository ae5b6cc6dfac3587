"""DICOM series as volumes, SEG and RTSTRUCT as their labels. pydicom parses; here are geometry and checks."""
