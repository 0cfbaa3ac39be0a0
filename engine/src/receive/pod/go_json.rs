//! Messages of the CRI out of the JSON that containerd writes of them.
//!
//! ```text
//!  Go's encoding/json, fields by their names in the .proto, those that are zero are left out
//!    {"metadata":{"name":"web","uid":"u"},"linux":{"security_context":{"namespace_options":{"pid":1}}}}
//!  a field that is not there ──> zero of its type        a field that the message does not have ──> an error
//! ```
//!
//! A field that is not known here may hold something that confines a container: leaving it out in silence would
//! set it free.

use serde::de::value::StrDeserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::{Error, Map, Value};

/// Reads a message.
///
/// # Errors
/// It is no JSON, or has a field that the message does not have.
pub(super) fn read<T: DeserializeOwned>(json: &str) -> Result<T, Error> {
    let value: Value = serde_json::from_str(json)?;
    T::deserialize(Go(Some(&value)))
}

/// A value, or the zero of its type.
#[derive(Debug, Clone, Copy)]
struct Go<'v>(Option<&'v Value>);

impl<'v> Go<'v> {
    fn value(self) -> Option<&'v Value> {
        self.0.filter(|value| !value.is_null())
    }

    fn object(self) -> Result<Option<&'v Map<String, Value>>, Error> {
        match self.value() {
            None => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(fields)),
            Some(other) => Err(Error::custom(format!("{other} is no object"))),
        }
    }
}

macro_rules! zero {
    ($($method:ident => $visit:ident($zero:expr)),* $(,)?) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            match self.value() {
                None => visitor.$visit($zero),
                Some(value) => value.$method(visitor),
            }
        })*
    };
}

impl<'de> Deserializer<'de> for Go<'de> {
    type Error = Error;

    zero! {
        deserialize_bool => visit_bool(false),
        deserialize_i32 => visit_i32(0),
        deserialize_i64 => visit_i64(0),
        deserialize_u32 => visit_u32(0),
        deserialize_u64 => visit_u64(0),
        deserialize_f64 => visit_f64(0.0),
        deserialize_str => visit_str(""),
        deserialize_string => visit_str(""),
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.value() {
            None => visitor.visit_none(),
            Some(_) => visitor.visit_some(self),
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.value() {
            None => visitor.visit_seq(Elements(&[])),
            Some(Value::Array(elements)) => visitor.visit_seq(Elements(elements)),
            Some(other) => Err(Error::custom(format!("{other} is no list"))),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let fields = self.object()?.into_iter().flatten();
        let entries: Vec<_> = fields
            .map(|(key, value)| (&**key, Go(Some(value))))
            .collect();
        visitor.visit_map(Entries(entries.into_iter(), Go(None)))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        known: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let fields = self.object()?;
        let unknown = { fields.into_iter().flatten() }
            .find(|(key, value)| !known.contains(&key.as_str()) && !value.is_null());
        if let Some((key, _)) = unknown {
            return Err(Error::custom(format!(
                "{name} has the field {key:?}, which is not known here"
            )));
        }
        let entries: Vec<_> = { known.iter() }
            .map(|key| (*key, Go(fields.and_then(|fields| fields.get(*key)))))
            .collect();
        visitor.visit_map(Entries(entries.into_iter(), Go(None)))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
        Err(Error::custom("a field of a kind that is not known here"))
    }

    forward_to_deserialize_any! {
        i8 i16 i128 u8 u16 u128 f32 char bytes byte_buf unit unit_struct newtype_struct tuple
        tuple_struct enum identifier ignored_any
    }
}

struct Elements<'v>(&'v [Value]);

impl<'de> SeqAccess<'de> for Elements<'de> {
    type Error = Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Error> {
        let Some((first, rest)) = self.0.split_first() else {
            return Ok(None);
        };
        self.0 = rest;
        seed.deserialize(Go(Some(first))).map(Some)
    }
}

struct Entries<'v>(std::vec::IntoIter<(&'v str, Go<'v>)>, Go<'v>);

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Error> {
        let Some((key, value)) = self.0.next() else {
            return Ok(None);
        };
        self.1 = value;
        seed.deserialize(StrDeserializer::new(key)).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        seed.deserialize(self.1)
    }
}

#[cfg(test)]
mod tests {
    use k8s_cri::v1::{ContainerConfig, NamespaceMode, PodSandboxConfig};

    use super::*;

    #[test]
    fn what_containerd_leaves_out_is_zero() {
        let json = r#"{"metadata":{"name":"web","uid":"u","namespace":"shop"},"log_directory":"/l",
            "labels":{"a":"b"},"linux":{"cgroup_parent":"/kubepods/podu","security_context":
            {"namespace_options":{"pid":1},"supplemental_groups":[7]},"sysctls":null}}"#;
        let config: PodSandboxConfig = read(json).unwrap();
        assert_eq!(config.metadata.unwrap().attempt, 0);
        assert_eq!(config.labels["a"], "b");
        let linux = config.linux.unwrap();
        assert!(linux.sysctls.is_empty());
        let security = linux.security_context.unwrap();
        assert_eq!(security.supplemental_groups, [7]);
        let modes = security.namespace_options.unwrap();
        assert_eq!(modes.pid(), NamespaceMode::Container);
        assert_eq!(modes.network(), NamespaceMode::Pod);
        assert!(config.windows.is_none() && config.port_mappings.is_empty());
    }

    #[test]
    fn what_it_does_not_know_is_refused() {
        let known = r#"{"image":{"image":"x"},"mounts":[{"host_path":"/a"}],"stdin_once":true}"#;
        let config: ContainerConfig = read(known).unwrap();
        assert!(config.stdin_once && config.mounts[0].host_path == "/a");
        for unknown in [
            r#"{"linux":{"confined":"very"}}"#,
            r#"{"mounts":[{"image":{"image":"x"},"shadow":1}]}"#,
            r#"{"image":7}"#,
            "[]",
        ] {
            read::<ContainerConfig>(unknown).unwrap_err();
        }
    }
}
