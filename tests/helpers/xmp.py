"""Metadata of photos: EXIF orientations, and names of faces (XMP) of several programs."""

import numpy as np

# EXIF orientation -> a function from the displayed picture to the stored picture.
STORED = {
    1: np.asarray, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
    5: lambda x: x.swapaxes(0, 1), 6: np.rot90, 7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x, 3),
}  # fmt: skip
SPACES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "mwg-rs": "http://www.metadataworkinggroup.com/schemas/regions/",
    "stArea": "http://ns.adobe.com/xmp/sType/Area#",
    "stDim": "http://ns.adobe.com/xap/1.0/sType/Dimensions#",
    "MP": "http://ns.microsoft.com/photo/1.2/",
    "MPRI": "http://ns.microsoft.com/photo/1.2/t/RegionInfo#",
    "MPReg": "http://ns.microsoft.com/photo/1.2/t/Region#",
}
RESOURCE = 'rdf:parseType="Resource"'


def packet(body, wrapper="x"):
    """Returns a packet of XMP (bytes) that contains the XML `body`."""
    spaces = " ".join(f'xmlns:{name}="{address}"' for name, address in SPACES.items())
    return (
        f'<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        f'<{wrapper}:xmpmeta xmlns:{wrapper}="adobe:ns:meta/"><rdf:RDF {spaces}>'
        f'<rdf:Description rdf:about="">{body}</rdf:Description></rdf:RDF></{wrapper}:xmpmeta>'
        '<?xpacket end="w"?>'
    ).encode()


def attributes(tags, shape=(400, 300), unit=' stArea:unit="normalized"', kind="Face"):
    """Returns the XML of named faces as digiKam and Lightroom write it: values are attributes.

    `tags` are (name, x, y, w, h): the middle, width and height of a box, as shares of the picture.
    """
    items = "".join(
        f'<rdf:li><rdf:Description mwg-rs:Name="{name}" mwg-rs:Type="{kind}" mwg-rs:Rotation="0.0">'
        f'<mwg-rs:Area stArea:x="{x}" stArea:y="{y}" stArea:w="{w}" stArea:h="{h}"{unit}/>'
        "</rdf:Description></rdf:li>"
        for name, x, y, w, h in tags
    )
    return (
        f'<mwg-rs:Regions {RESOURCE}><mwg-rs:AppliedToDimensions stDim:w="{shape[0]}" '
        f'stDim:h="{shape[1]}" stDim:unit="pixel"/><mwg-rs:RegionList><rdf:Bag>{items}'
        "</rdf:Bag></mwg-rs:RegionList></mwg-rs:Regions>"
    )


def elements(tags, resource=RESOURCE, bag="Seq"):
    """Returns the XML of named faces as Apple, Picasa and ExifTool write it: values are texts."""
    begin, end = (f" {resource}>", "") if resource else ("><rdf:Description>", "</rdf:Description>")
    items = "".join(
        f"<rdf:li{begin}\n<mwg-rs:Area{begin}<stArea:x>{x}</stArea:x><stArea:y>{y}</stArea:y>"
        f"<stArea:w>{w}</stArea:w><stArea:h>{h}</stArea:h><stArea:unit>normalized</stArea:unit>"
        f"{end}</mwg-rs:Area><mwg-rs:Type>Face</mwg-rs:Type><mwg-rs:Name>{name}</mwg-rs:Name>\n"
        f"{end}</rdf:li>"
        for name, x, y, w, h in tags
    )
    return (
        f"<mwg-rs:Regions{begin}<mwg-rs:AppliedToDimensions{begin}<stDim:w>400</stDim:w>"
        f"<stDim:h>300</stDim:h>{end}</mwg-rs:AppliedToDimensions><mwg-rs:RegionList>"
        f"<rdf:{bag}>{items}</rdf:{bag}></mwg-rs:RegionList>{end}</mwg-rs:Regions>"
    )


def microsoft(tags, as_elements=False):
    """Returns the XML of named faces as Windows Live Photo Gallery writes it."""
    items = ""
    for name, x, y, w, h in tags:
        values = {"Rectangle": f"{x - w / 2}, {y - h / 2}, {w}, {h}", "PersonDisplayName": name}
        if as_elements:
            inner = "".join(f"<MPReg:{k}>{v}</MPReg:{k}>" for k, v in values.items())
            items += f"<rdf:li {RESOURCE}>{inner}</rdf:li>"
        else:
            inner = " ".join(f'MPReg:{k}="{v}"' for k, v in values.items())
            items += f"<rdf:li><rdf:Description {inner}/></rdf:li>"
    return (
        f"<MP:RegionInfo {RESOURCE}><MPRI:Regions><rdf:Bag>{items}</rdf:Bag></MPRI:Regions>"
        "</MP:RegionInfo>"
    )
