//! A patch that is computed and applied at the same time, so that each step sees what those before it have done.

use serde_json::{Map, Value};

use super::Operation;

/// A pod, and what was added to it so far.
pub(super) struct Patch {
    pod: Value,
    operations: Vec<Operation>,
}

impl Patch {
    pub(super) fn new(pod: &Value) -> Patch {
        Patch { pod: pod.clone(), operations: Vec::new() }
    }

    /// The pod as it is by now.
    pub(super) fn pod(&self) -> &Value {
        &self.pod
    }

    pub(super) fn into_operations(self) -> Vec<Operation> {
        self.operations
    }

    /// Sets members of the object at `path`, which is made, whole, if there is none.
    pub(super) fn set(&mut self, path: &[&str], members: Map<String, Value>) {
        if members.is_empty() {
            return;
        }
        match self.pod.pointer(&pointer(path)) {
            Some(Value::Object(_)) => {
                for (name, value) in members {
                    self.add(&[path, &[name.as_str()]].concat(), value);
                }
            }
            _ => self.add(path, Value::Object(members)),
        }
    }

    /// Appends to the list at `path`, which is made, whole, if there is none.
    pub(super) fn append(&mut self, path: &[&str], values: Vec<Value>) {
        if values.is_empty() {
            return;
        }
        match self.pod.pointer(&pointer(path)) {
            Some(Value::Array(_)) => {
                for value in values {
                    self.add(&[path, &["-"]].concat(), value);
                }
            }
            _ => self.add(path, Value::Array(values)),
        }
    }

    /// Inserts into the list at `path`, before what is at `index` now.
    pub(super) fn insert(&mut self, path: &[&str], index: usize, value: Value) {
        self.add(&[path, &[index.to_string().as_str()]].concat(), value);
    }

    /// An operation that can't be applied is none: what the API server couldn't apply must not be sent to it.
    fn add(&mut self, path: &[&str], value: Value) {
        let Some((name, parent)) = path.split_last() else { return };
        match self.pod.pointer_mut(&pointer(parent)) {
            Some(Value::Object(object)) => {
                object.insert((*name).to_owned(), value.clone());
            }
            Some(Value::Array(list)) if *name == "-" => list.push(value.clone()),
            Some(Value::Array(list)) => match name.parse() {
                Ok(index) if index <= list.len() => list.insert(index, value.clone()),
                _ => return,
            },
            _ => return,
        }
        self.operations.push(Operation::Add { path: pointer(path), value });
    }
}

/// A JSON pointer (RFC 6901).
fn pointer(path: &[&str]) -> String {
    path.iter().map(|name| format!("/{}", name.replace('~', "~0").replace('/', "~1"))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap_or_default()
    }

    #[test]
    fn what_is_absent_is_made_once_and_whole() {
        let mut patch = Patch::new(&json!({"spec": {"volumes": null}}));
        patch.append(&["spec", "volumes"], vec![json!(1), json!(2)]);
        patch.append(&["spec", "volumes"], vec![json!(3)]);
        patch.set(&["metadata"], object(json!({"a/b": 1, "c~d": 2})));
        patch.set(&["metadata"], object(json!({"a/~b": 1})));
        patch.insert(&["spec", "volumes"], 0, json!(0));
        let expected = json!({"spec": {"volumes": [0, 1, 2, 3]}, "metadata": {"a/b": 1, "c~d": 2, "a/~b": 1}});
        assert_eq!(patch.pod(), &expected);
        let operations = serde_json::to_value(patch.into_operations()).unwrap();
        let expected = json!([
            {"op": "add", "path": "/spec/volumes", "value": [1, 2]},
            {"op": "add", "path": "/spec/volumes/-", "value": 3},
            {"op": "add", "path": "/metadata", "value": {"a/b": 1, "c~d": 2}},
            {"op": "add", "path": "/metadata/a~1~0b", "value": 1},
            {"op": "add", "path": "/spec/volumes/0", "value": 0},
        ]);
        assert_eq!(operations, expected);
    }

    #[test]
    fn what_could_not_be_applied_is_no_operation() {
        let mut patch = Patch::new(&json!({"spec": "odd", "list": []}));
        patch.append(&["spec", "volumes"], vec![json!(1)]);
        patch.insert(&["list"], 1, json!(1));
        assert_eq!(patch.into_operations(), []);
    }
}
