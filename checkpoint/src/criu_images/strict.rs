//! Protobuf messages of which each field is where CRIU's own writer puts it.
//!
//! ```text
//! message: repeated { varint key = number << 3 | wire type;
//!                     0: varint   1: 8 bytes   2: varint length, bytes   5: 4 bytes }
//! ```
//!
//! Decoders differ in what they make of a singular field that comes twice: one takes the last,
//! another merges. What is compared here must be what CRIU will see, so such a message is refused:
//! CRIU writes a singular field once.

use std::ops::Range;

use super::{Image, ImageError};

/// More than a message of CRIU has: what is remembered of a field is twenty times as long as the shortest one.
const MOST_FIELDS: usize = 1 << 20;

/// One field of a message: its number, wire type, and where it and its value are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Field {
    pub(crate) number: u64,
    pub(crate) whole: Range<usize>,
    pub(crate) value: Range<usize>,
}

/// The fields of a message, in order; `None` when it is none.
pub(crate) fn fields(message: &[u8]) -> Option<Vec<Field>> {
    let mut fields = Vec::new();
    let mut at = 0;
    while at < message.len() {
        let start = at;
        let key = varint(message, &mut at)?;
        let value = match key & 7 {
            0 => {
                let from = at;
                varint(message, &mut at)?;
                from..at
            }
            wire @ (1 | 5) => at..at.checked_add(if wire == 1 { 8 } else { 4 })?,
            2 => {
                let len = usize::try_from(varint(message, &mut at)?).ok()?;
                at..at.checked_add(len)?
            }
            _ => return None,
        };
        message.get(value.clone())?;
        at = value.end;
        if fields.len() == MOST_FIELDS {
            return None;
        }
        fields.push(Field {
            number: key >> 3,
            whole: start..at,
            value,
        });
    }
    Some(fields)
}

/// Whether a field that is not in `repeated` is there more than once, or the bytes are no message.
pub(crate) fn is_ambiguous(message: &[u8], repeated: &[u64]) -> bool {
    let Some(fields) = fields(message) else {
        return true;
    };
    let mut seen: Vec<u64> = fields
        .iter()
        .map(|field| field.number)
        .filter(|number| !repeated.contains(number))
        .collect();
    seen.sort_unstable();
    seen.windows(2).any(|pair| pair[0] == pair[1])
}

/// The values of the fields `number` of a message in which only those in `repeated` may be there more than once.
pub(crate) fn parts<'a>(
    image: &Image,
    message: &'a [u8],
    number: u64,
    repeated: &[u64],
) -> Result<Vec<&'a [u8]>, ImageError> {
    if is_ambiguous(message, repeated) {
        return Err(image.ambiguous());
    }
    let all = fields(message).ok_or_else(|| image.ambiguous())?;
    let wanted = all.into_iter().filter(|field| field.number == number);
    Ok(wanted.map(|field| &message[field.value]).collect())
}

/// The value of a length-delimited field.
pub(crate) fn submessage(message: &[u8], number: u64) -> Option<&[u8]> {
    let field = fields(message)?
        .into_iter()
        .find(|it| it.number == number)?;
    message.get(field.value)
}

/// The message with `change` made to its submessage `number`, everything else as it is.
pub(crate) fn edit_submessage(
    message: &[u8],
    number: u64,
    change: impl FnOnce(&[u8]) -> Vec<u8>,
) -> Vec<u8> {
    let old = submessage(message, number).unwrap_or_default();
    let new = change(old);
    let mut edited = without(message, number);
    prost::encoding::encode_key(key_number(number), WIRE_LEN, &mut edited);
    prost::encoding::encode_varint(new.len() as u64, &mut edited);
    edited.extend(new);
    edited
}

/// The message with each submessage `number` for which `change` gives a new one replaced, in its place.
///
/// # Errors
/// Those of `change`.
pub(crate) fn edit_submessages<E>(
    message: &[u8],
    number: u64,
    mut change: impl FnMut(&[u8]) -> Result<Option<Vec<u8>>, E>,
) -> Result<Vec<u8>, E> {
    let mut edited = Vec::with_capacity(message.len());
    for field in fields(message).unwrap_or_default() {
        let new = match field.number == number {
            true => change(&message[field.value.clone()])?,
            false => None,
        };
        match new {
            Some(new) => {
                prost::encoding::encode_key(key_number(number), WIRE_LEN, &mut edited);
                prost::encoding::encode_varint(new.len() as u64, &mut edited);
                edited.extend(new);
            }
            None => edited.extend(&message[field.whole]),
        }
    }
    Ok(edited)
}

/// The message with its varint field `number` having these values.
pub(crate) fn set_varints(message: &[u8], number: u64, values: &[u64]) -> Vec<u8> {
    let mut edited = without(message, number);
    for value in values {
        prost::encoding::encode_key(key_number(number), WIRE_VARINT, &mut edited);
        prost::encoding::encode_varint(*value, &mut edited);
    }
    edited
}

const WIRE_LEN: prost::encoding::WireType = prost::encoding::WireType::LengthDelimited;
const WIRE_VARINT: prost::encoding::WireType = prost::encoding::WireType::Varint;

fn key_number(number: u64) -> u32 {
    u32::try_from(number).expect("the numbers are constants of this program")
}

fn without(message: &[u8], number: u64) -> Vec<u8> {
    let fields = fields(message).unwrap_or_default();
    fields
        .into_iter()
        .filter(|field| field.number != number)
        .flat_map(|field| message[field.whole].iter().copied())
        .collect()
}

fn varint(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        value |= u64::from(byte & 0x7f).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twice_is_ambiguous_unless_it_may_repeat() {
        let once = set_varints(&[], 3, &[7]);
        let twice = [once.clone(), once.clone()].concat();
        assert!(!is_ambiguous(&once, &[]));
        assert!(is_ambiguous(&twice, &[]));
        assert!(!is_ambiguous(&twice, &[3]));
        for broken in [
            &b"\x18"[..],
            b"\x1a\x05ab",
            b"\x1f",
            b"\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        ] {
            assert!(is_ambiguous(broken, &[3]), "{broken:?}");
        }
    }

    #[test]
    fn an_edit_leaves_the_rest() {
        let inner = set_varints(&set_varints(&[], 1, &[5]), 2, &[1, 2]);
        let message = edit_submessage(&set_varints(&[], 9, &[4]), 5, |_| inner);
        let edited = edit_submessage(&message, 5, |inner| set_varints(inner, 2, &[8]));
        assert_eq!(submessage(&edited, 5), Some(&b"\x08\x05\x10\x08"[..]));
        assert_eq!(fields(&edited).unwrap()[0].number, 9);
    }
}
