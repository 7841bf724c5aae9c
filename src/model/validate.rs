// SPDX-License-Identifier: LGPL-2.1-or-later

//! Implements VALIDATE: checks a caller's XML against libvirt's own schema.

use std::path::Path;

use crate::error::{Code, Error, Result, fail};
use crate::tool::Tool;

/// The path that libvirt installs the schema to.
const SCHEMA: &str = "/usr/share/libvirt/schemas/domainsnapshot.rng";

/// Returns an error if `xml` does not match the schema of `<domainsnapshot>`. xmllint checks it.
pub fn validate(xml: &str) -> Result<()> {
    if !Path::new(SCHEMA).exists() {
        fail!(
            OperationUnsupported,
            "flag 'VIR_DOMAIN_SNAPSHOT_CREATE_VALIDATE' needs libvirt's schema '{SCHEMA}'"
        );
    }
    let step = |error: std::io::Error| Error::system("cannot write the XML to be validated", error);
    let file = tempfile::NamedTempFile::new().map_err(step)?;
    std::fs::write(file.path(), xml).map_err(step)?;
    let mut lint = Tool::new("xmllint");
    lint.args(["--noout", "--nonet", "--relaxng", SCHEMA]).arg(file.path());
    let path = file.path().display().to_string();
    lint.run().map_err(|reason| {
        if reason.contains("cannot run") {
            return Error::new(Code::OperationUnsupported, reason);
        }
        // The temporary file's name means nothing to the caller, and xmllint's last line says only
        // that the check failed.
        let lines = reason.lines().filter(|line| !line.ends_with(" fails to validate"));
        let reason = lines.map(|line| line.replace(&path, "XML")).collect::<Vec<_>>().join("; ");
        Error::new(
            Code::XmlInvalidSchema,
            format!("XML document failed to validate against schema: {reason}"),
        )
    })
}
